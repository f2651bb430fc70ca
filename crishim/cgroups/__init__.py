"""Where the cgroups of pods and containers are and what they count."""
