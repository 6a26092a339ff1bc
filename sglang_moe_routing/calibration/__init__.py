"""Where similarity artifacts come from, and how far one can be trusted."""
