"""The `jaxlm` command, a file for each kind of thing that it works on."""
