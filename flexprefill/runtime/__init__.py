"""What depends on torch's insides or on the machine, and what a whole process shares."""
