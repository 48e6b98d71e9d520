"""Reports of a run in progress: metrics, trackers, console, times."""
