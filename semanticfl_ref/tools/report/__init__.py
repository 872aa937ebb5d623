"""What a run leaves behind: its folder, its metrics, its summary. No torch in here."""
