"""What the service must not forget: keys, files, jobs, models, aliases. Storage is the truth for
what was trained; this is the index over it, and `rebuild` makes it anew."""
