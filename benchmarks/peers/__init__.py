"""What else does the same work on this device, written as its documentation recommends."""
