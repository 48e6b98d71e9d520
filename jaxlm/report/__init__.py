"""Tables, charts and HTML pages of runs."""
