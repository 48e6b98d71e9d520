"""What a person looks at: tables, curves, a page."""
