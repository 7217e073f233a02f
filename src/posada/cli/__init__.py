"""The command line. Every module is loaded only for the verbs that need it."""
