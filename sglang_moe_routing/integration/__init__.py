"""The only room that imports sglang: attaches routing policies to an unmodified engine."""
