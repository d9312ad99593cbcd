"""What a step does: who asks, which job it means, how it runs, and what comes of it."""
