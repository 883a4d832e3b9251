"""Other engines, in environments of their own, to be measured beside this one."""
