"""What the converters share: their flags, readers of archives, and the writer of folders and zips."""
