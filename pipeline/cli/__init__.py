"""The command line: each module holds a few subcommands that parse, call one stage and print its result."""
