"""What a run tells while it goes: metrics, trackers, console, times."""
