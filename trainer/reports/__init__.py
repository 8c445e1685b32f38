"""`dit-train report`: a page for people, a file for programs."""
