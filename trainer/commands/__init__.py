"""One file a command of `dit-train`; anything heavy is imported when the command runs."""
