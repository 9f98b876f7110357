"""What a run reports: its folder, its alarms and its HTML page."""
