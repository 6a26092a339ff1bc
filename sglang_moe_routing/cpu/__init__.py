"""A portable CPU platform for SGLang: runs the real engine on any machine, no AMX needed."""
