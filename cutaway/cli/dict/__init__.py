"""`cutaway dict`: dictionaries trained, judged, converted and shown."""
