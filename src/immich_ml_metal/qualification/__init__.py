"""What each engine answers on this machine: measured, judged, remembered, and chosen by."""
