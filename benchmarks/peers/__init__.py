"""One program per side: it measures for a while and prints one JSON object of figures as its last line."""
