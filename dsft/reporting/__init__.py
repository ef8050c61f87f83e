"""What a run has done, told afterwards: report.html, report.md, and the card of a merged model. No torch."""
