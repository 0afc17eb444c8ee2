"""What the browser gets: plain HTML, CSS and JavaScript modules, served as they are."""
