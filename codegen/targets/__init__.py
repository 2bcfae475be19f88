"""From the engine's Target (a machine as data) to the compiler's own target object."""
