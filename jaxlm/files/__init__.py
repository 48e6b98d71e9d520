"""Files that are whole or not there, checked when read, with one writer."""
