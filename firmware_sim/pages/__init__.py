"""What people look at: pages, charts, tables, words, and the screen while something runs."""
