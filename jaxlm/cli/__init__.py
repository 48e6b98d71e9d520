"""The commands of `jaxlm`, one module for each kind of object."""
