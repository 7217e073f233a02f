"""Machines as a person knows them: names, state, operations, snapshots, recovery. One house, opened by any process."""
