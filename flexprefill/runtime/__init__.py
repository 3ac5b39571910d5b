"""What leans on torch's insides and on the machine, and what is shared by a whole process."""
