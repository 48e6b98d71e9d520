"""From and to the folders of Hugging Face transformers."""
