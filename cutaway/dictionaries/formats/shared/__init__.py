"""Common parts of the formats: finding and opening files, and the simple layout that most of them have."""
