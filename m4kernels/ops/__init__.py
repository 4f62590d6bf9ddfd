"""One folder an op: reference.py (the specification), api.py (public function, registration), one file a backend."""
