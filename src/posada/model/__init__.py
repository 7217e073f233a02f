"""Values: specs, states, capabilities, records. Frozen, validated, no I/O."""
