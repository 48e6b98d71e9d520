"""Trains a language model: `python launch.py --config configs/tiny.py [--flag value …]`."""

from jaxlm.huge_pages import use_huge_pages

if __name__ == "__main__":
    use_huge_pages()  # before the slow imports: it may start Python again

    from jaxlm.launch import leave, main, run_main

    leave(run_main(main))
