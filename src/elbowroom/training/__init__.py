"""What every training technique needs: tracing, layers, stages, the user's script, memory."""
