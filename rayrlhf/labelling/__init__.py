"""What people say of answers: their judgements, how far they agree, and one ranking from several people."""
