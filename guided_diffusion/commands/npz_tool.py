"""Images of an npz to PNG files and back: to-png, from-images."""

from .entry import entry

main = entry("npz_tool", "npz_files.run")
