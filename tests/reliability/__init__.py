"""What must go wrong without harm: attacks kept as programs, run short by the tests beside."""
