"""Which backend answers: a contextual bandit over arms that come and go. Pure numpy; start reading at `routing`."""
