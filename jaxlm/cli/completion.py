"""`jaxlm completion`: shell scripts that complete words, flags and paths.

tyro's completion proposes no paths in bash, and starts Python at each Tab.
"""

from collections.abc import Mapping, Sequence

_BASH = """_jaxlm() {{
  local IFS=$' \\t\\n' words="" cur="${{COMP_WORDS[COMP_CWORD]}}"
  case "${{COMP_WORDS[*]:1:$((COMP_CWORD - 1))}} " in
{}
  esac
  if [[ $words == -* && $cur != -* ]]; then words=""; fi
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _jaxlm jaxlm"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"
_FISH = """complete -c jaxlm -n 'string match -q -- "{}" (string join " " (commandline -opc) "")'"""


def script(shell: str, proposed: Mapping[str, Sequence[str]]) -> str:
    """The script for bash, zsh or fish; paths are proposed where no word fits.

    Args:
      shell: bash, zsh or fish.
      proposed: words typed so far -> words that may follow directly, or flags that may follow
        anywhere.
    """
    lines = []
    for typed, words in proposed.items():
        so_far, flags = " ".join(["jaxlm", *typed.split(), ""]), words[0].startswith("-")
        if shell != "fish":
            lines.append(f'    "{typed} "{"*" if flags else ""}) words="{" ".join(words)}" ;;')
        elif flags:
            lines += [f"{_FISH.format(so_far + '*')} -l {word[2:]}" for word in words]
        else:
            lines.append(f"{_FISH.format(so_far)} -f -a '{' '.join(words)}'")
    text = "\n".join(lines)
    return text if shell == "fish" else (_ZSH if shell == "zsh" else "") + _BASH.format(text)
