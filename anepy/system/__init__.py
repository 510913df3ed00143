"""What the computer and the process offer: files, downloads, signals, facts about the machine."""
