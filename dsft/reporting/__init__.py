"""Reports on runs, as HTML and Markdown. No torch."""
