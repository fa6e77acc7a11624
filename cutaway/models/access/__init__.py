"""Access: where each site's tensor passes, how it is read, written and differentiated."""
