"""What one does with a finished cache: verify, repair, convert, describe."""
