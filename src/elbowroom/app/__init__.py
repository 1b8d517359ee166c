"""What a user asks for, wired from facts, decisions and mechanisms."""
