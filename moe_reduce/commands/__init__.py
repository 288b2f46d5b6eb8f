"""What a user types: each module describes the arguments of one command and hands them to the rooms above."""
