// Browsers do not let a page from the disk start the worker that searches: no field for it there.
if (location.protocol === "file:") document.documentElement.classList.add("from-disk")
