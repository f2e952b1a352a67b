"""What an agent does to its host: one verb a file, each with probe, run and undo."""
