"""Reports of finished, unfinished and damaged runs, made from their records alone."""
