"""Memory and time of a run on devices that this machine lacks."""
