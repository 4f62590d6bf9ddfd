"""Pictures for people; imports no other room."""
