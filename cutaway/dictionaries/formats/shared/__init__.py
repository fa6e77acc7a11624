"""What several formats share: finding and opening files, and the simple layout that most of them have."""
